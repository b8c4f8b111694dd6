mod download;
mod push;
mod sink;
