"""Adapters (LoRA and its kin) in the formats that trainers write, merged into the weights."""
