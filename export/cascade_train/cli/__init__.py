"""The commands of training: `train`, `difficulty` and `analyse`, and the options that they share."""
