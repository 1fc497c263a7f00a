//! kage-migrate.
