"""From a run directory to report.html, report.json and model_card.md."""
