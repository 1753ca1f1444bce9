"""From statistics and networks to the neurons that stay and the weights that take over."""
