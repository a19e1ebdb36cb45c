"""One question a notebook: its study, its analysis, its verdicts."""
