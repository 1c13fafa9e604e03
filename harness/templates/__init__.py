"""What each bug of the catalogue does to the logits of a golden's own work, and what an error has in common with it."""
