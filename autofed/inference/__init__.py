"""From weights to label maps with uncertainty, and how good they are."""
