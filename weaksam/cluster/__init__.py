"""Jobs of a Ray cluster: settings, submission, examination of its nodes."""
