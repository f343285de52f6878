"""Many runs: `python -m fastdreamer.report` puts them beside each other and beside published figures."""
