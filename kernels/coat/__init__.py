"""AdamW's moments in FP8, with a range that is expanded group by group."""
