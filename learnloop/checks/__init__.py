"""What `learnloop.testing` is made of; nothing but that, tests, docs and benchmarks imports it."""
