"""`weightfs doctor`: what stands in the way on this machine, and what to do about it.

Rules: verdicts are pure functions of facts (`machine`, `storage`, `network`); `probes` and `origins` gather the facts,
`examine` runs them side by side. Nothing is created or changed, nothing waits without a bound, no secret is shown.
"""
