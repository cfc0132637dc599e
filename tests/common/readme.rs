//! The blocks of code in README.md.

/// One block.
pub struct Block {
    /// What stands behind the opening fence.
    pub language: String,
    pub text: String,
}

/// All blocks, in their order.
pub fn blocks() -> Vec<Block> {
    let readme = include_str!("../../README.md");
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in readme.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                open = Some(Block { language: language.to_owned(), text: String::new() });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "the last block of README.md is not closed");
    blocks
}

/// The only block with this text in it.
pub fn block(part: &str) -> Block {
    let mut with: Vec<Block> =
        blocks().into_iter().filter(|block| block.text.contains(part)).collect();
    assert_eq!(with.len(), 1, "blocks of README.md with '{part}'");
    with.remove(0)
}
