"""What methods are made of: an encoder alone, or a student and its teacher, with a loss to add."""
