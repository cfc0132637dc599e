# What a contributor runs by hand; .ci/run runs the same.

.PHONY: build test conformance grpcurl lint ci

build:
	cargo build --locked

test:
	cargo test --locked

# The public Connect conformance suite against the wire layer (needs Go).
conformance:
	scripts/conformance.sh

# A session with the standard gRPC client over TCP and a unix socket (needs Go).
grpcurl:
	scripts/grpcurl-session.sh

lint:
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo deny --locked check --hide-inclusion-graph licenses bans sources

ci:
	.ci/run
