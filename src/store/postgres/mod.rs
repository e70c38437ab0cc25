//! A store in PostgreSQL.
