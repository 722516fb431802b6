"""What tests, demonstrations and benchmarks share, and what authors of new sources and layouts can subclass.

Import from the submodules: `nginx` (a private real server), `tls` (a private CA), `origin` (a server that
commits every fault), `sources` (`MemorySource`, `FlakySource`, the conformance class `SourceTests`).
"""
