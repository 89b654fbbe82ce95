"""What everything else stands on: State, Split, records, errors, paths."""
