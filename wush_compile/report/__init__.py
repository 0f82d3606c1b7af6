"""What people look at: `explain` and its parts."""
