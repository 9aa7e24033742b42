"""A person's verdicts on videos: the file that holds them (`verdict_file`), and their way into the ledger (`apply`)."""
