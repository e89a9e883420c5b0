"""`python -m lowmem.runtime`: the process of one resident model."""

from lowmem.runtime.worker import main

main()
