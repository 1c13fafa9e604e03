"""How good the verdict is: false alarms on correct implementations, and the bug catalogue found or missed.

- drawn: prompts that nothing was trained or tuned on, and their goldens
- ledger: results as JSON lines, so that a run that was ended goes on where it was
- processes: a run shared among processes
- opening: live engines with a correct family in them, and a recorder of all their logits
- nulls: verdicts on correct implementations, and how far these scatter
- trial, trials: bugs, controls and correct implementations before every rule, ours and the peers'
- judges, curves, paired, survivors, detection: what the trials add up to
- rendering, plot: the same as text, JSON and a figure
- naming, naming_table: which bugs the templates name, and what they name where there is none
- certificate: which bugs the gate of a user's own model and suite sees, and what others need
"""
