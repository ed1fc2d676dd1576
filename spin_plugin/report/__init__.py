"""`report.html`, `report.json` and `report.jsonl` in `output_dir`: what self-play did, from the run's files."""
