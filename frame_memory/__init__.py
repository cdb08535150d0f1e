"""Frame Memory: the library behind the nodes. Rooms: plan, model, sampling, video."""
