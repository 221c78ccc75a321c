"""The scheduler: decides from the demand and the free memory which pools are started and stopped."""
