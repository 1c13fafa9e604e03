"""Where a candidate that is not the same model goes wrong: what its weights, tables and modules say."""
