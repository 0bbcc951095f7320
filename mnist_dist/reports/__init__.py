"""Pictures and pages made from a run folder. Only `plots` and `style` load matplotlib, the layer table does not."""
