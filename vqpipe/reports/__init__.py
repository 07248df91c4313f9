"""What people look at: pictures, plots, and one HTML page that opens offline."""
