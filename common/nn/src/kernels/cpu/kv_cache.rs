//! The keys and values of one layer, in blocks that sequences own through block tables.

use super::Rows;
use super::buffer::AlignedBuf;
use super::tile::TILE_DEPTH;

/// Block sizes are multiples of this: a register of keys never spans two blocks.
const KEY_LANES: usize = 16;
/// Value rows are padded to multiples of this: two registers of the widest instruction set.
const VALUE_LANES: usize = 32;

/// The shape of a [`KvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    pub num_blocks: usize,
    /// Tokens per block, a multiple of 16.
    pub block_size: usize,
    pub num_kv_heads: usize,
    /// At most 256.
    pub head_dim: usize,
}

/// Paged keys and values of one layer.
///
/// Keys are stored as `[num_blocks, K, D, block_size]`, so that one multiply-add advances the scores of a register of
/// keys and no score needs a horizontal sum; values as `[num_blocks, K, block_size, D]`, with `D` padded to 32.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    keys: AlignedBuf,
    values: AlignedBuf,
}

impl KvCache {
    /// An empty cache. Memory is committed as blocks are first written.
    pub fn new(layout: KvLayout) -> Self {
        let KvLayout { num_blocks, block_size, num_kv_heads, head_dim } = layout;
        assert!(block_size > 0 && block_size.is_multiple_of(KEY_LANES), "a block holds a multiple of {KEY_LANES} keys");
        assert!((1..=TILE_DEPTH).contains(&head_dim), "heads have 1 to {TILE_DEPTH} elements");
        let num_rows = num_blocks * num_kv_heads * block_size;
        let keys = AlignedBuf::zeros(num_rows * head_dim);
        let values = AlignedBuf::zeros(num_rows * layout.value_width());
        Self { layout, keys, values }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Stores one token per row; `slots[i]` is its block times `block_size` plus its offset in the block.
    ///
    /// # Shapes
    /// - slots: `[rows]`, keys, values: `[rows, K * D]`.
    pub fn write(&mut self, slots: &[u32], keys: Rows, values: Rows) {
        let KvLayout { block_size, num_kv_heads, head_dim, .. } = self.layout;
        let width = num_kv_heads * head_dim;
        assert_eq!((keys.num_rows(), values.num_rows()), (slots.len(), slots.len()), "every slot needs one row");
        assert_eq!((keys.width(), values.width()), (width, width), "rows must hold {num_kv_heads} heads of {head_dim}");
        let (key_len, value_len) = (self.layout.key_block_len(), self.layout.value_block_len());
        let value_width = self.layout.value_width();
        let (key_store, value_store) = (self.keys.as_mut_slice(), self.values.as_mut_slice());
        for (i, slot) in slots.iter().enumerate() {
            let (block, offset) = (*slot as usize / block_size, *slot as usize % block_size);
            let heads = keys.row(i).chunks_exact(head_dim).zip(values.row(i).chunks_exact(head_dim));
            for (head, (key, value)) in heads.enumerate() {
                let place = block * num_kv_heads + head;
                let columns = key_store[place * key_len..][..key_len].chunks_exact_mut(block_size);
                for (column, element) in columns.zip(key) {
                    column[offset] = *element;
                }
                value_store[place * value_len + offset * value_width..][..head_dim].copy_from_slice(value);
            }
        }
    }

    /// Copies whole blocks, in order, for copy-on-write.
    ///
    /// # Shapes
    /// - pairs: (source block, destination block).
    pub fn copy_blocks(&mut self, pairs: &[(u32, u32)]) {
        let num_kv_heads = self.layout.num_kv_heads;
        let (key_len, value_len) = (self.layout.key_block_len(), self.layout.value_block_len());
        for (store, len) in [(&mut self.keys, key_len * num_kv_heads), (&mut self.values, value_len * num_kv_heads)] {
            for (source, destination) in pairs {
                let source = *source as usize * len;
                store.as_mut_slice().copy_within(source..source + len, *destination as usize * len);
            }
        }
    }

    /// `[D, block_size]` of one head of one block.
    #[inline(always)]
    pub(super) fn keys(&self, block: u32, head: usize) -> &[f32] {
        let len = self.layout.key_block_len();
        &self.keys.as_slice()[(block as usize * self.layout.num_kv_heads + head) * len..][..len]
    }

    /// `[block_size, value_width]` of one head of one block.
    #[inline(always)]
    pub(super) fn values(&self, block: u32, head: usize) -> &[f32] {
        let len = self.layout.value_block_len();
        &self.values.as_slice()[(block as usize * self.layout.num_kv_heads + head) * len..][..len]
    }
}

impl KvLayout {
    /// Bytes that a [`KvCache`] of this layout takes once every block has been written.
    pub fn num_bytes(&self) -> usize {
        let block = self.num_kv_heads * (self.key_block_len() + self.value_block_len());
        self.num_blocks * block * size_of::<f32>()
    }

    /// `D`, padded.
    #[inline(always)]
    pub(super) fn value_width(&self) -> usize {
        self.head_dim.next_multiple_of(VALUE_LANES)
    }

    #[inline(always)]
    fn key_block_len(&self) -> usize {
        self.head_dim * self.block_size
    }

    #[inline(always)]
    fn value_block_len(&self) -> usize {
        self.block_size * self.value_width()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::random;
    use super::*;

    const LAYOUT: KvLayout = KvLayout { num_blocks: 3, block_size: 16, num_kv_heads: 2, head_dim: 5 };

    /// Key and value of one head at a slot.
    fn read(cache: &KvCache, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let (block, offset) = ((slot / 16) as u32, slot % 16);
        let key = cache.keys(block, head).chunks(16).map(|column| column[offset]).collect();
        (key, cache.values(block, head)[offset * 32..][..5].to_vec())
    }

    #[test]
    fn tokens_are_found_in_their_slots() {
        let mut cache = KvCache::new(LAYOUT);
        // Keys and values are columns of one wider row, as a fused projection produces them.
        let rows = random(4 * 25, 1);
        let slots = [0, 17, 47, 3];
        cache.write(&slots, Rows::columns(&rows, 25, 5..15), Rows::columns(&rows, 25, 15..25));
        for (i, slot) in slots.iter().enumerate() {
            for head in 0..2 {
                let expect = [5, 15].map(|start| rows[i * 25 + start + head * 5..][..5].to_vec());
                assert_eq!(read(&cache, *slot as usize, head), expect.into());
            }
        }
    }

    #[test]
    fn copied_blocks_are_equal_and_independent() {
        let mut cache = KvCache::new(LAYOUT);
        let rows = random(16 * 10, 1);
        let slots: Vec<u32> = (16..32).collect();
        cache.write(&slots, Rows::new(&rows, 10), Rows::new(&rows, 10));
        cache.copy_blocks(&[(1, 2), (2, 0)]);
        cache.write(&[16], Rows::new(&[9.0; 10], 10), Rows::new(&[9.0; 10], 10));
        for offset in 0..16 {
            for head in 0..2 {
                let row = rows[offset * 10 + head * 5..][..5].to_vec();
                assert_eq!(read(&cache, offset, head), (row.clone(), row.clone()));
                assert_eq!(read(&cache, 32 + offset, head), (row.clone(), row));
            }
        }
    }

    #[test]
    fn bytes_count_both_stores() {
        let cache = KvCache::new(LAYOUT);
        let floats = cache.keys.as_slice().len() + cache.values.as_slice().len();
        assert_eq!(LAYOUT.num_bytes(), floats * 4);
    }
}
