"""E-mail: messages in MIME are read under bounds, stored with their attachments and threads, and answered."""
