"""Who is answered when: a line of requests in front of the model, see :class:`~ragkv.Scheduler`."""
