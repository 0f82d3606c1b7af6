"""What people look at: `explain`."""
