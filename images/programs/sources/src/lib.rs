//! Names the crates that carry C sources, so that `Cargo.lock` has their checksums. Never built.
