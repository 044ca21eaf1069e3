"""The dense retriever: contrastive SFT, then Retrieval-GRPO [TaoSearchEmb s3]."""
