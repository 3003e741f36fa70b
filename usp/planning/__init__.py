"""Pure data: who sees whom, which token is where, what to do in which order, what it costs."""
