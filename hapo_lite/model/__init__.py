"""What a policy is and where it comes from: base, adapter, precision, sharding."""
