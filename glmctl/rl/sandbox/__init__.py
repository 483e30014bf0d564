"""Running code that a model wrote: levels of isolation, limits, and a judge that shares no process with it."""
