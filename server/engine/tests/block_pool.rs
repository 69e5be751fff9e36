//! The block pool against the plainest model of one.

use ingle_engine::{BlockHash, BlockHasher, BlockId, BlockPool};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

#[derive(Debug, Clone)]
enum Op {
    Allocate,
    /// Each picks among the blocks held, in order of holding.
    Share(usize),
    Release(usize),
    Register(usize, u32),
    Lookup(u32),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Allocate),
        1 => any::<usize>().prop_map(Op::Share),
        3 => any::<usize>().prop_map(Op::Release),
        2 => (any::<usize>(), 0..6_u32).prop_map(|(at, name)| Op::Register(at, name)),
        2 => (0..6_u32).prop_map(Op::Lookup),
    ]
}

/// A name for a text of one token.
fn name(text: u32) -> (BlockHash, BlockHash) {
    let hasher = BlockHasher::new([3; 32]);
    let root = hasher.root(&[0; 32]);
    (hasher.block(&root, &[text]), root)
}

/// Cases that failed once are kept beside this file and tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(kept)), ..ProptestConfig::with_cases(2000) }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn behaves_like_lists(num_blocks in 1..8_usize, caching: bool, ops in prop::collection::vec(op(), 1..80)) {
        let mut pool = BlockPool::new(num_blocks, caching);
        // One entry a reference, and what each block is known as.
        let mut held: Vec<BlockId> = Vec::new();
        let mut names: Vec<Option<u32>> = vec![None; num_blocks];
        let mut free: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
        for op in ops {
            match op {
                Op::Allocate => {
                    let expected = (!free.is_empty()).then(|| free.remove(0));
                    prop_assert_eq!(pool.allocate(), expected);
                    if let Some(block) = expected {
                        names[block.idx()] = None;
                        held.push(block);
                    }
                }
                Op::Share(at) if !held.is_empty() => {
                    let block = held[at % held.len()];
                    pool.share(block);
                    held.push(block);
                }
                Op::Release(at) if !held.is_empty() => {
                    let block = held.remove(at % held.len());
                    pool.release(block);
                    if !held.contains(&block) {
                        let at = if names[block.idx()].is_some() { free.len() } else { 0 };
                        free.insert(at, block);
                    }
                }
                Op::Register(at, text) if !held.is_empty() => {
                    let block = held[at % held.len()];
                    let (hash, parent) = name(text);
                    pool.register(block, hash, parent, &[text]);
                    if caching && !names.contains(&Some(text)) && names[block.idx()].is_none() {
                        names[block.idx()] = Some(text);
                    }
                }
                Op::Lookup(text) => {
                    let (hash, parent) = name(text);
                    // Other tokens under the same hash are no hit.
                    prop_assert_eq!(pool.lookup(&hash, &parent, &[text + 100]), None);
                    prop_assert_eq!(pool.lookup(&hash, &hash, &[text]), None);
                    let at = names.iter().position(|name| *name == Some(text));
                    let expected = at.map(|idx| BlockId(idx as u32));
                    prop_assert_eq!(pool.lookup(&hash, &parent, &[text]), expected);
                    if let Some(block) = expected {
                        free.retain(|other| *other != block);
                        held.push(block);
                    }
                }
                _ => {}
            }
            let mut holders = vec![0; num_blocks];
            held.iter().for_each(|block| holders[block.idx()] += 1);
            prop_assert_eq!(pool.check_integrity(&holders), Ok(()));
            prop_assert_eq!(pool.free_list(), free.clone());
            prop_assert_eq!(pool.num_free(), free.len());
            prop_assert_eq!(pool.num_cached_free(), free.iter().filter(|b| names[b.idx()].is_some()).count());
        }
    }
}

#[test]
#[should_panic(expected = "released more often than taken")]
fn releasing_twice_is_noticed() {
    let mut pool = BlockPool::new(2, true);
    let block = pool.allocate().expect("a block");
    pool.release(block);
    pool.release(block);
}

#[test]
fn integrity_notices_a_wrong_count() {
    let mut pool = BlockPool::new(2, true);
    let block = pool.allocate().expect("a block");
    assert!(pool.check_integrity(&[0, 0]).is_err());
    let mut holders = [0, 0];
    holders[block.idx()] = 1;
    assert_eq!(pool.check_integrity(&holders), Ok(()));
}
