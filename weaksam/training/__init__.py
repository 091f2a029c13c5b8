"""The one training loop on Ray Train, its settings and state, and the tasks that read and decode for it."""
