"""From statistics and networks to the neurons that a model keeps, with output weights refitted to them."""
