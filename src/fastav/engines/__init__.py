"""Ways to run models, one each."""
