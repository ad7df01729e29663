"""The studies behind the README's numbers: what is trained, how it is measured and recorded."""
