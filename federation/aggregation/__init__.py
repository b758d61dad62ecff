"""From many updates to one model: validation, Flower's strategies, FedBuff. No clock, no network."""
