"""The ground floor: files, JSON, tables, trees and identities. It imports no other floor."""
