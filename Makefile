# What a contributor runs by hand; .ci/run runs the same.

.PHONY: build test conformance model grpcurl static size image bases vm lint ci

build:
	cargo build --locked

test:
	cargo test --locked

# The public Connect conformance suite against the wire layer (needs Go).
conformance:
	scripts/conformance.sh

# The interleavings of the journal's readers and writers.
model:
	cargo test --locked -p envd-model

# A session with the standard gRPC client over TCP and a unix socket (needs Go).
grpcurl:
	scripts/grpcurl-session.sh

# The one static file for images, the same bytes from the same commit: target/static/envd.
static:
	scripts/static.sh

# How large it is, and how much memory it has resident while idle.
size: static
	scripts/size.sh

# A Debian image with envd in it, a kernel and initramfs for it, below target/image (needs root);
# IMAGE="--init envd", say, makes another one: rootfs/build.sh --help.
image: static
	rootfs/build.sh $(IMAGE)

# What becomes of bases that are not Debian (needs root).
bases: static
	scripts/bases.sh

# Real guests under QEMU, checked over vsock and TCP (needs root); VM="pid1 minimal", say, runs some
# of the scenarios of tests/vm/main.rs.
vm: static
	scripts/vm.sh $(VM)

lint:
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo deny --locked check --hide-inclusion-graph licenses bans sources

ci:
	.ci/run
