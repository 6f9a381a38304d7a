"""Pictures and the page of the participant's report."""
