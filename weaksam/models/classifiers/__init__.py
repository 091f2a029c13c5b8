"""Which classes an image holds, and where they show."""
