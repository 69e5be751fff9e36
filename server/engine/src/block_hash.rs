//! Names of full cache blocks: a keyed 256-bit hash chain.
//!
//! The hash of a block covers its tokens and the hash of the block before it; the chain starts with the tenant's salt.
//! So equal hashes mean equal prefixes under one salt. The key is drawn per process: nobody outside can prepare two
//! prefixes with one hash. Tokens are compared on a hit all the same, see [`crate::block_pool`].

/// Name of a full block together with everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

/// Makes [`BlockHash`]es under one key.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    key: [u8; 32],
}

impl BlockHasher {
    /// Hashes of different keys have nothing in common.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// The parent of a sequence's first block.
    #[must_use]
    pub fn root(&self, salt: &[u8; 32]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"root").update(salt);
        BlockHash(*hasher.finalize().as_bytes())
    }

    /// The hash of the block that holds `tokens` and follows `parent`.
    #[must_use]
    pub fn block(&self, parent: &BlockHash, tokens: &[u32]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        // A root hashes 36 bytes and a block at least 37, so the two can never be the same input.
        hasher.update(b"block").update(&parent.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        BlockHash(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_depends_on_key_salt_parent_and_tokens() {
        let hasher = BlockHasher::new([1; 32]);
        let root = hasher.root(&[0; 32]);
        let block = hasher.block(&root, &[1, 2, 3]);
        assert_eq!(block, hasher.block(&hasher.root(&[0; 32]), &[1, 2, 3]));
        assert_ne!(block, hasher.block(&root, &[1, 2, 4]));
        assert_ne!(block, hasher.block(&root, &[1, 2]));
        assert_ne!(block, hasher.block(&block, &[1, 2, 3]));
        assert_ne!(block, hasher.block(&hasher.root(&[9; 32]), &[1, 2, 3]));
        let other = BlockHasher::new([2; 32]);
        assert_ne!(block, other.block(&root, &[1, 2, 3]));
        assert_ne!(root, other.root(&[0; 32]));
    }

    #[test]
    fn chained_blocks_differ_from_one_long_block() {
        let hasher = BlockHasher::new([7; 32]);
        let root = hasher.root(&[0; 32]);
        let two = hasher.block(&hasher.block(&root, &[1, 2]), &[3, 4]);
        assert_ne!(two, hasher.block(&root, &[1, 2, 3, 4]));
    }
}
