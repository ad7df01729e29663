"""What tests share: models, methods, data, ways to train, to watch and to run scripts."""
