//! The part of moka that the crate uses, as a map behind a lock of shuttle. With moka itself, no other
//! task could take a step before a call of moka.

/// A map that threads share.
pub mod sync {
    use std::collections::HashMap;
    use std::hash::{BuildHasher, Hash};
    use std::marker::PhantomData;

    use shuttle::sync::Mutex;

    pub struct Cache<K, V, S>(Mutex<HashMap<K, V, S>>);

    pub struct CacheBuilder<K, V, S>(PhantomData<(K, V, S)>);

    impl<K, V, S> CacheBuilder<K, V, S> {
        pub fn build_with_hasher(self, hasher: S) -> Cache<K, V, S> {
            Cache(Mutex::new(HashMap::with_hasher(hasher)))
        }
    }

    impl<K: Eq + Hash, V: Clone, S: BuildHasher> Cache<K, V, S> {
        pub fn builder() -> CacheBuilder<K, V, S> {
            CacheBuilder(PhantomData)
        }

        pub fn get(&self, key: &K) -> Option<V> {
            self.0.lock().unwrap().get(key).cloned()
        }

        pub fn insert(&self, key: K, value: V) {
            self.0.lock().unwrap().insert(key, value);
        }

        pub fn invalidate(&self, key: &K) {
            self.0.lock().unwrap().remove(key);
        }

        pub fn run_pending_tasks(&self) {}
    }
}
