"""Plans a run before it is queued: memory, communication, time, cost, data rate, disk and failures, by formula."""
