"""From judged responses to a training set."""
