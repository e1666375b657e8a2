"""What a deployment costs: FLOPs, memory, and the devices that it may run on."""
