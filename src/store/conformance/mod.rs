//! Checks that a store keeps the contract.
